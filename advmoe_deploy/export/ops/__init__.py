"""The custom operators of domain ``ai.advmoe``: their bodies of standard operators and schemas."""
