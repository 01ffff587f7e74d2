"""Many checkpoints at once: found in a folder, converted by several processes, recorded in a manifest, resumed.

To read it, in this order: `find` (which checkpoints a folder holds), `record` (what a manifest says of each), `work`
(one of them, in a worker process), `pool` (the processes), `run` (all of them) and `merge` (manifests of shards).
"""
