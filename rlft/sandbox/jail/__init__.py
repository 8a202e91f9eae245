"""The inside of the sandbox: what runs in the processes that untrusted programs are started from.

Standard library only, and every file runs under a bare interpreter. `start` is the entry and runs the tests of one
program one after another; `walls` closes a process in, by `kernel`, `landlock` and `seccomp`; `trial` is one test;
`candidate` and `examiner` are its two processes, which speak by `wire`; `remote` is how a test uses the program's
functions; `session` runs a program in pieces and keeps its state.

No expected value ever enters the process that runs a program, nor one that it is forked from. What comes out of it is
data, and is judged elsewhere.
"""
