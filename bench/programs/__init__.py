"""Programs that the benches run in separate processes. Each reads its options as JSON from stdin and prints JSON.

For example: `echo '{…}' | python -m bench.programs.generate`, in quill's folder.
"""
