"""Graph passes, each with a contract that is checked after it ran."""
