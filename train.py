"""Adapt, fine-tune, score or export from a config: `python train.py fit --config configs/quickstart.yaml`."""

from trainers.cli import main

if __name__ == "__main__":
    main()
