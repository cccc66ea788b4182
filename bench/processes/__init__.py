"""Programs that the benchmarks run beside themselves, as servers are: each is given orders and reports."""
