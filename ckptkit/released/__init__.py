"""Released weights: what they must be, and whether they are.

- `selection` finds the files; `examine` says what is in each, and `reading` reads it once for all that is asked
- `manifests` record what was read
- `policy` says what is allowed, `config` where that is written down
- `rules` hold a file against both, `judge` all files, `checking` from what was typed to the report
- `results` are what came of it, and `outputs` how that is written
"""
