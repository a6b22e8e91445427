"""Each clause of the specification, proven against the recording device model in tests/model."""
