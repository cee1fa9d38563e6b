"""``python -m hyperadapt`` is the command ``hyperadapt``."""

from hyperadapt_cli import main

if __name__ == "__main__":
    main()
