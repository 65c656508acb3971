"""Every figure that the project quotes, each against a C floor in the same run."""
