"""`python -m gradloc.cli`, for launchers such as torchrun. The command line itself is in `main`."""

import sys

from gradloc.cli import main

sys.exit(main())
