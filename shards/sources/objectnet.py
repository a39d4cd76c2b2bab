"""ObjectNet as its archive unpacks (``images/``, ``mappings/``): the classes of ImageNet among its 313, to test on.

Of what is in an image ImageNet may have several classes: a chair is a barber chair, a folding chair or a rocking chair.
An image has them all as labels, so that a model of ImageNet's 1,000 classes is right with any (``pipeline evaluate``).
That is how the authors' own code scores ("ObjectNet", Barbu et al. 2019; github.com/abarbu/objectnet-template-pytorch):
the five best of all 1,000, those that ObjectNet does not have counting as wrong.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shards.errors import UserError
from shards.objects import MissingError
from shards.sources import Item, clean_key
from shards.sources.folder import EXTENSIONS
from shards.sources.official import Official

FOLDERS = "mappings/folder_to_objectnet_label.json"  # names of ObjectNet's classes by folder
NAMES = "mappings/objectnet_to_imagenet_1k.json"  # ImageNet's names of a class of ObjectNet's, "A; B"
ORDER = "mappings/pytorch_to_imagenet_2012_id.json"  # numbers by index of an output, from 0
NUMBERED = "mappings/imagenet_to_label_2012_v2"  # ImageNet's names by these numbers, a line each
REMEDY = "unpack objectnet-1.0.zip again"
WNIDS = Path(__file__).with_name("imagenet_1k.txt")


class ObjectNet(Official):
    """The images of the 113 classes that ImageNet has too; its 1,000 WordNet ids, sorted, are the classes.

    Args:
        root: Folder that has ``images`` and ``mappings``.
        unpacked: Not needed.

    Raises:
        UserError: A file is missing, or is none of these.
    """

    kind = "objectnet"
    mark = NAMES
    multi_label = True
    border = 2  # red, so that nobody trains on them unawares

    def __init__(self, root: str, unpacked: Path | None):
        super().__init__(root, unpacked)
        self.classes = WNIDS.read_text().split()
        folders, names, order = (self._table(name) for name in (FOLDERS, NAMES, ORDER))
        indices = defaultdict(list)  # of outputs, by ImageNet's names, of which a few are those of two classes
        lines = self._bytes(NUMBERED, REMEDY).decode("utf-8", "replace").splitlines()
        try:
            for index, number in order.items():
                indices[lines[number].strip()].append(int(index))
            indices.default_factory = None  # a name that is not there is an error from here on
            self._labels = {
                folder: tuple(sorted({index for name in names[label].split("; ") for index in indices[name]}))
                for folder, label in sorted(folders.items())
                if label in names
            }
            good = self._labels and all(
                "/" not in folder and 0 <= labels[0] <= labels[-1] < len(self.classes)
                for folder, labels in self._labels.items()
            )
        except (LookupError, TypeError, ValueError, AttributeError):
            good = False
        if not good:
            raise UserError(f"the mappings of {root} do not fit each other; {REMEDY}")
        self._folders = len(folders)

    def items(self) -> Iterator[Item]:
        """Yield the images of ImageNet's classes, folder by folder.

        Raises:
            UserError: A folder has none: accuracies would be of other classes.
        """
        for folder, labels in self._labels.items():
            images = []
            with suppress(MissingError):
                images += [
                    each for each in self._store.walk(f"images/{folder}") if each.path.lower().endswith(EXTENSIONS)
                ]
            if not images:
                raise UserError(f"{self.root} has no images in images/{folder}; {REMEDY}")
            for path, size, changed in images:
                yield Item(clean_key(path.removeprefix("images/")), path, 0, size, labels, (), changed)
        self.others = {"classes that ImageNet does not have": self._folders - len(self._labels)}

    def _table(self, name: str) -> dict:
        try:
            found = json.loads(self._bytes(name, REMEDY))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.root}/{name} is damaged, or another file; {REMEDY}")
        return found
