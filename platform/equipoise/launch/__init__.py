"""Where runs happen: this process, Ray Train, Ray Tune. The only place that imports Ray or Optuna."""
