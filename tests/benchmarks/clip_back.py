"""clip-retrieval's back end over given embeddings, for `serving.py`; runs in an environment that has clip-retrieval.

    PEER/bin/python clip_back.py FOLDER PORT

FOLDER/embeddings is as `clip-retrieval inference` leaves it. The index is made by its own `clip_index` with its own
defaults, unless it is there; then its own KnnService answers in its own Flask server, as its `clip_back` starts it, but
on loopback and without loading CLIP, which queries that are embeddings do not need.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    sys.path.pop(0)  # this folder, in which another file has the package's name
    index = folder / "index"
    if not (index / "metadata").exists():
        from clip_retrieval.clip_index import clip_index

        index.mkdir(exist_ok=True)
        began = time.perf_counter()
        clip_index(str(folder / "embeddings"), str(index))
        (folder / "index_seconds.json").write_text(json.dumps(time.perf_counter() - began))
    from clip_retrieval.clip_back import ClipResource, KnnService, load_index, load_metadata_provider
    from flask import Flask
    from flask_restful import Api

    columns = ["url", "image_path", "caption", "NSFW"]
    image_index = load_index(str(index / "image.index"), False)
    provider, _ = load_metadata_provider(str(index), False, False, image_index, columns, False)
    resource = ClipResource(
        device="cpu", model=None, preprocess=None, tokenizer=None, model_txt_mclip=None, safety_model=None,
        violence_detector=None, metadata_provider=provider, image_index=image_index, text_index=None,
        ivf_old_to_new_mapping=None, columns_to_return=columns, metadata_is_ordered_by_ivf=False,
        aesthetic_embeddings=None,
    )  # fmt: skip
    app = Flask(__name__)
    Api(app).add_resource(KnnService, "/knn-service", resource_class_kwargs={"clip_resources": {"given": resource}})
    app.run(host="127.0.0.1", port=port, debug=False)


if __name__ == "__main__":
    main()
