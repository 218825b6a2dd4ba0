"""Measuring explanations: metrics, tasks with known evidence, baselines, cases and tables."""
