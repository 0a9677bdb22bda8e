"""One Pyro model a file, each a sentence in pirl's vocabulary: `pirl fit models/NAME.py` or `python -m models.NAME`."""
