"""``python -m lightning_dp`` is the command ``lightning-dp``."""

from lightning_dp.cli import main

if __name__ == "__main__":
    main()
