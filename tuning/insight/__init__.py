"""From tables to conclusions: analysis, verdict, calibration, confidence intervals, ensembles."""
