"""PocketBase's side: client, dialects, schema, record codec, filters, and the way a commit is made."""
