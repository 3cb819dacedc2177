"""Programs of their own, one for each peer of `bench.duplicates`: texts come as a file of JSON, clusters go back so.

They import no code of ours, and of each other nothing: each runs in an environment with that peer alone.
"""

import sys
from typing import NamedTuple


class Peer(NamedTuple):
    """A program, what it needs, and what it is told beside the file of texts and a folder for its files."""

    program: str
    packages: tuple[str, ...]
    arguments: tuple[str, ...]
    python: str


_DATATROVE = """
import json, os, struct, sys, time
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
texts, folder = json.load(open(sys.argv[1])), sys.argv[2]
config = MinhashConfig(n_grams=5, num_buckets=int(sys.argv[3]), hashes_per_bucket=int(sys.argv[4]),
                       hash_config=HashConfig(precision=64))
docs = lambda: (Document(text=text, id=str(at)) for at, text in enumerate(texts))
began = time.perf_counter()
MinhashDedupSignature(output_folder=folder + "/signatures", config=config).run(docs(), 0, 1)
for bucket in range(config.num_buckets):
    MinhashDedupBuckets(input_folder=folder + "/signatures", output_folder=folder + "/buckets", config=config).run(
        None, bucket, config.num_buckets)
MinhashDedupCluster(input_folder=folder + "/buckets", output_folder=folder + "/clusters", config=config,
                    save_cluster_id=True, ignore_index_matches=False).run(None, 0, 1)
seconds = time.perf_counter() - began
clusters = list(range(-1, -1 - len(texts), -1))
path = folder + "/clusters/000000.clusters"
if os.path.exists(path):
    for document, cluster in struct.iter_unpack("<II", open(path, "rb").read()):
        clusters[document] = cluster
print(json.dumps({"clusters": clusters, "seconds": seconds}))
"""
_TEXT_DEDUP = """
import json, pickle, sys, time
from pathlib import Path
texts, folder = json.load(open(sys.argv[1])), Path(sys.argv[2])
with open(folder / "texts.jsonl", "w") as file:
    for text in texts:
        print(json.dumps({"text": text}), file=file)
(folder / "config.toml").write_text(f'''
[input]
input_type = "local_files"
file_type = "json"
[input.read_arguments]
path = "json"
data_files = "{folder}/texts.jsonl"
split = "train"
[algorithm]
algorithm_name = "minhash"
text_column = "text"
seed = 42
batch_size = 10000
num_proc = 1
num_perm = 240
threshold = {sys.argv[3]}
hash_bits = 64
ngram_size = 5
check_false_positive = true
[output]
output_dir = "{folder}/output"
save_clusters = true
[debug]
enable_profiling = false
''')
out, sys.stdout = sys.stdout, sys.stderr
from text_dedup.config.base import load_config_from_toml
from text_dedup.minhash import main
config = load_config_from_toml(folder / "config.toml")
began = time.perf_counter()
main(config)
seconds = time.perf_counter() - began
found = pickle.load(open(folder / "output" / "clusters.pickle", "rb"))
clusters = [int(found.get(at, -1 - at)) for at in range(len(texts))]
print(json.dumps({"clusters": clusters, "seconds": seconds}), file=out)
"""
_OF_DATATROVE = ("datatrove[processing]==0.10.0", "spacy", "orjson")
PEERS: dict[str, Peer] = {
    "datatrove 0.10 (14 of 8)": Peer(_DATATROVE, _OF_DATATROVE, ("14", "8"), sys.executable),
    "datatrove 0.10 (18 of 6)": Peer(_DATATROVE, _OF_DATATROVE, ("18", "6"), sys.executable),
    "text-dedup 0.4.1 (240 permutations, verified)": Peer(_TEXT_DEDUP, ("text-dedup==0.4.1",), ("0.8",), "3.12"),
}
