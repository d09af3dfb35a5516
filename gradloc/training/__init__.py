"""Training with gradloc: corpora, and Hugging Face Trainer with a layer plan plugged in.

Imports nothing by itself, so that reading a corpus does not pay for the Trainer:
`gradloc.training.corpus`, `gradloc.training.train`, `gradloc.training.callback`, and for resuming
`gradloc.training.checkpoints`.
"""
