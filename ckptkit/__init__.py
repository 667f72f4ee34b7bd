"""Inspect, convert and verify PyTorch checkpoints without executing them.

The layers, each importing only from those to its right; a test enforces it:

    cli > api > verify > torch_bridge > inspection, compare > formats, rewrite, transfer > normalize
        > pickling > plan > checkpoint > bytesource, report > dtypes, limits, codes, errors
"""

__version__ = "0.1.0"
