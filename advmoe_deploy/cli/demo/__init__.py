"""The command ``demo``: from digits to a served model, and the report it leaves."""
