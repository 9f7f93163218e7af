"""What users do with an engine, feature by feature, in as few engine starts as possible: `tests.e2e.test_parity`."""
