"""What is measured. Each workload is a coroutine function that takes a `Run`, and is one module."""
