"""Commands of training: train, sweep, and show, which explains their settings."""
