"""``python -m ckptkit``."""

from ckptkit.cli import run

if __name__ == "__main__":
    run()
