"""`pb-cached doctor`: looks at a PocketBase as the library will use it, and changes nothing."""
