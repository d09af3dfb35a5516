"""Says what a policy is, so that a resumed run can be compared with its beginning.

Runs no policy.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any


def policy_name(policy: Any) -> str:
    """What a policy is, in words that are the same in the process that resumes its run.

    Dataclasses say their settings, functions and types their module and name; an address never
    appears. Also names the settings inside.
    """
    if isinstance(policy, partial):
        words = [policy_name(part) for part in (policy.func, *policy.args)]
        words += [f"{key}={policy_name(value)}" for key, value in sorted(policy.keywords.items())]
        return f"partial({', '.join(words)})"
    if is_dataclass(policy) and not isinstance(policy, type):
        pairs = [(field.name, getattr(policy, field.name)) for field in fields(policy)]
        words = [f"{name}={policy_name(value)}" for name, value in pairs]
        return f"{type(policy).__qualname__}({', '.join(words)})"
    shown = repr(policy)
    if not hasattr(policy, "__qualname__") and not re.search(r"\bat 0x[0-9a-fA-F]+", shown):
        return shown
    if isinstance(policy, (tuple, list)):
        return f"[{', '.join(policy_name(part) for part in policy)}]"
    named = policy if hasattr(policy, "__qualname__") else type(policy)
    return f"{named.__module__}.{named.__qualname__}"
