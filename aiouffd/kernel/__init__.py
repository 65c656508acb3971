"""The uAPI: numbers, calls, pagemap, probe."""
