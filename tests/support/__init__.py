"""What several files of tests share: oracles, generated checkpoints, small models, and programs that are run."""
