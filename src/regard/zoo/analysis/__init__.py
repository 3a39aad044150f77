"""Looking into attention: interpretability, theory, benchmarks and surveys."""
