"""Released weights: what they must be, and whether they are.

- `selection` finds the files; `examine` says what is in each, and `reading` reads it once for all that is asked
- `manifest_maker` records what was read in a `manifest_file`
- `policy` says what is allowed, `config` where that is written down
- `policy_rules` and `manifest_rules` hold a file against both, `checking` all files, from what was typed to the report
- `results` are what came of it, and `outputs` how that is written
"""
