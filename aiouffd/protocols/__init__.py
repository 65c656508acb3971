"""Other programs' hand-over protocols: sans-IO parsers under thin asyncio parts."""
