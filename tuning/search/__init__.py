"""Ray and Optuna: the driver, its trials, early stopping and suggestions."""
