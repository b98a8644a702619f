"""SIFA, trained, watched and searched: everything but `equipoise.launch` runs where Ray, W&B and Optuna are absent."""
