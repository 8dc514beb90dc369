"""From tables to conclusions: analysis, verdict, overfitting, calibration, ensembles."""
