"""``python -m lightning_dp`` is the command ``lightning-dp``."""

from lightning_dp.cli.main import main

if __name__ == "__main__":
    main()
