"""``python -m hyperadapt`` is the command ``hyperadapt``."""

from hyperadapt.cli import main

if __name__ == "__main__":
    main()
