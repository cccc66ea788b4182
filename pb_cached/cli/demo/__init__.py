"""`pb-cached demo`. Imports nothing: the demo and its Parlant server each take what they need from here."""
