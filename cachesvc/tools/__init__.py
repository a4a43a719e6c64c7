"""`kvist cache` and `kvist top`: tools for whoever runs a cache. They need no engine.

Exit codes, of every command: 0 done and all well; 1 done and something is wrong or not there; 2 a
flag is wrong or nobody answers; 130 interrupted by Ctrl-C; 141 whoever read the output went away.
"""
