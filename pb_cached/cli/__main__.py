from pb_cached.cli import main

main()
