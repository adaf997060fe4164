"""How the bundled miniature models were made; not part of the installed package."""
