"""Examples of each verb, shown by its `--help`. Words that a shell would split are quoted."""

EXAMPLES = {
    "demo": ("demo", "demo --out tour"),
    "add": (
        "add my.memory photos/",
        "add my.memory s3://bucket/tars/ --labels column:class --keep camera --dry-run",
    ),
    "index": ("index my.memory --dry-run", "index my.memory --max-memory 4G --target-recall 0.99"),
    "classify": (
        "classify my.memory new.jpg other.jpg",
        "classify my.memory new.jpg --where \"camera = 'Canon' and year >= 2020\" --json",
        "classify my.memory s3://bucket/unsorted/ --out s3://bucket/decided/",
    ),
    "explain": ("explain my.memory new.jpg --html why.html", "explain my.memory new.jpg --exclude 1649267441664"),
    "search": ("search my.memory new.jpg -k 20", "search my.memory new.jpg --json"),
    "evaluate": (
        "evaluate my.memory held-out/",
        "evaluate my.memory --leave-one-out -k 10 --voting rank",
        "evaluate my.memory --leave-one-out --sample 20K",
    ),
    "influence": (
        "influence my.memory --dataset crawled",
        "influence my.memory held-out/ --id 1649267441664 --json",
        "influence my.memory --assume 1649267441664=wolf",
    ),
    "suspects": (
        "suspects my.memory --html suspects.html --out suspects.csv",
        "suspects my.memory --kind duplicated --limit 20 --json",
    ),
    "relabel": (
        "relabel my.memory --id 1649267441664 --label wolf",
        "relabel my.memory --label-set coarse --map fine-to-coarse.csv",
    ),
    "forget": (
        "forget my.memory --label wolf --dry-run",
        "forget my.memory --uri photos/me.jpg --erase --verify --receipt receipts/",
    ),
    "rollback": ("rollback my.memory 41",),
    "status": ("status my.memory", "status my.memory --index --json"),
    "history": ("history my.memory --limit 20",),
    "verify": ("verify my.memory", "verify my.memory --clean"),
    "compact": ("compact my.memory",),
    "expire": ("expire my.memory --keep 30d --dry-run", "expire my.memory --keep 100"),
    "copy": ("copy my.memory s3://bucket/my.memory",),
    "export": ("export my.memory vectors/", "export my.memory vectors/ --format parquet --rows-per-file 500K"),
    "plan-capacity": ("plan-capacity my.memory --rows 200M --memory-per-node 64G --qps 500",),
    "serve": ("serve my.memory", "serve s3://bucket/my.memory --host 0.0.0.0 --port 8000 --token-file token"),
    "submit": (
        "submit add s3://bucket/my.memory s3://bucket/photos/ --address http://head:8265",
        "submit --attach add-1f2e3d4c --address http://head:8265",
    ),
}
