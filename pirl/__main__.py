"""``python -m pirl`` is the command ``pirl``."""

from pirl.cli import main

if __name__ == "__main__":
    main()
