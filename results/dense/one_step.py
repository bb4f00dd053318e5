"""One real optimiser step at the papers' size, ViT-B with random weights, and the memory that it takes.

    python results/dense/one_step.py segment        # 2 images of 512 × 512
    python results/dense/one_step.py detect         # 1 image of 1024 × 1024

Evaluates one image, too. The images are made here: 20 rectangles on noise.
"""
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))


def write(root, size, number):
    """`number` images for training and one for validation, with masks and with annotations in COCO's format."""
    random = np.random.RandomState(0)
    for split in ("train", "val"):
        for folder in (split, f"images/{split}", f"masks/{split}", "annotations"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        content = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in range(1, 81)]}
        for index in range(1, 1 + (number if split == "train" else 1)):
            img, mask = random.randint(0, 256, (size, size, 3), np.uint8), np.zeros((size, size), np.uint8)
            for _ in range(20):
                (x, y), (w, h) = random.randint(0, size - 200, 2), random.randint(20, 200, 2)
                label = random.randint(1, 81)
                img[y:y + h, x:x + w], mask[y:y + h, x:x + w] = random.randint(0, 256, 3), label
                content["annotations"].append({
                    "id": 1 + len(content["annotations"]), "image_id": index, "category_id": int(label),
                    "bbox": [int(n) for n in (x, y, w, h)],
                    "segmentation": [[int(n) for n in (x, y, x + w, y, x + w, y + h, x, y + h)]]})
            content["images"].append({"id": index, "file_name": f"{index}.png", "width": size, "height": size})
            Image.fromarray(img).save(root / split / f"{index}.png")
            Image.fromarray(img).save(root / "images" / split / f"{index}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{index}.png")
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    (root / "classes.json").write_text(json.dumps({"classes": [str(i) for i in range(150)]}))


def main(name):
    module = __import__(name)
    size, number = {"segment": (512, 2), "detect": (1024, 1)}[name]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), size, number)
        start = time.time()
        module.main(module.get_args(
            f"--ckpt none --data {folder} --output_dir {folder}/out --num_steps 1 --warmup_steps 0 --num_workers 0 "
            f"--batch_size {number} --device cpu".split()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{name}: {number} image(s) of {size}, ViT-B: peak memory {peak:.1f} GB, {time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main(sys.argv[1])
