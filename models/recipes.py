"""How the architectures are trained: {setting: value} by recipe and family. Settings: minidl/settings.py.

fast    50 epochs, annealed to zero within them: what an epoch of training is worth depends on the schedule most of all
paper   each author's own, from their released code, or what they answered who asked
report  the student report's, as far as it says what it did: Adam on unvaried images

Weight decay is on all parameters, batch norm's included, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minidl.errors import UsageError
from minidl.layer import Layer
from models import find, report, res2net, resnext, simplenet, wideresnet

Recipe = dict[str, Any]

FAMILIES: dict[Callable[..., Layer], str] = {
    simplenet.simplenet: "simplenet", resnext.resnext29: "resnext", res2net.res2next29: "res2net",
    wideresnet.wide_resnet: "wideresnet", report.report_resnext: "report-resnext"}

SGD: Recipe = dict(optimizer="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4)
CROP_AND_FLIP: Recipe = dict(padding=4, flip=True)

FAST: Recipe = dict(SGD, **CROP_AND_FLIP, epochs=50, batch_size=128, lr=0.1, sched="cosine", warmup_epochs=2)
FAST_OF: dict[str, Recipe] = {"wideresnet": dict(reflect=True)}

# github.com/facebookresearch/ResNeXt, train.lua: drops in the first epoch e with e > 0.49 * 300, and with e > 0.74 * 300.
RESNEXT: Recipe = dict(SGD, **CROP_AND_FLIP, epochs=300, batch_size=128, lr=0.1, sched="multistep", milestones=[147, 222],
                       factor=0.1)
PAPER_OF: dict[str, Recipe] = {
    # github.com/Coderx7/SimpleNet_Pytorch, the run with 78.37 %. Its network had one more pool:
    # `--model-kwargs extra_pool=true`. Its images were shifted before they were normalized, so that what they lacked was black,
    # not the mean colour; and its last dropout was at work in the test, too.
    "simplenet": dict(CROP_AND_FLIP, epochs=550, batch_size=100, optimizer="adadelta", lr=0.1, rho=0.9, eps=1e-3,
                      weight_decay=0.002, sched="multistep", milestones=[100, 190, 306, 390, 440, 540], factor=0.1),
    "resnext": RESNEXT,
    # The author in issues 13 and 36 of github.com/Res2Net/Res2Net-PretrainedModels; the rest as ResNeXt. The drops are those
    # of github.com/prlz77/ResNeXt.pytorch, on which the author's code seems to rest: issue 14 has its names of layers.
    "res2net": dict(RESNEXT, batch_size=64, lr=0.05, milestones=[150, 225], normalize="imagenet"),
    # github.com/szagoruyko/wide-residual-networks: train.lua and scripts/train_cifar.sh.
    "wideresnet": dict(SGD, **CROP_AND_FLIP, model_kwargs=dict(gamma="uniform"), reflect=True, normalize="cifar10", epochs=200,
                       batch_size=128, lr=0.1, sched="multistep", milestones=[59, 119, 159], factor=0.2, restart_at_milestones=True),
}
# The small SimpleNets were trained in Caffe only: 310k for 120,800 iterations of 64 images, drops after 50,000 and 95,000.
PAPER_OF_MEMBER: dict[str, Recipe] = {
    name: dict(PAPER_OF["simplenet"], epochs=155, batch_size=64, weight_decay=1e-4, milestones=[64, 122])
    for name in ("simplenet-310k", "simplenet-460k")}

# Of ResNeXt the report names Adam, He's initial values and no augmentation, of SimpleNet 50 epochs; of Wide ResNets, that
# runs were stopped early. All else is a reading: Adam as Keras has it, at a constant rate, batches of 128, pixels from 0 to 1,
# and what stops a run.
REPORT: Recipe = dict(epochs=50, batch_size=128, optimizer="adam", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-7, weight_decay=0.0,
                      sched="constant", normalize="none")
REPORT_OF: dict[str, Recipe] = {
    "simplenet": dict(model_kwargs=dict(dropout="elements", rate=0.2, initializer="he")),
    "wideresnet": dict(model_kwargs=dict(classifier="he"), val_split=5000, patience=10)}

# Digits are centred, so they are not shifted; a mirrored digit is no digit. There are few: smaller batches.
DIGITS: Recipe = dict(padding=0, reflect=False, flip=False)
FAST_DIGITS: Recipe = dict(epochs=3, batch_size=16, lr=0.0125)


def recipe(name: str, arch: str, dataset: str) -> Recipe:
    """The settings of the recipe `name`, fast, paper or report, for the architecture `arch` on a data set. Raises UsageError where
    there is none."""
    arch, architecture = find(arch)
    family = FAMILIES.get(architecture.builder, "")  # of one of the user's
    if name == "fast":
        chosen = dict(FAST, **FAST_OF.get(family, {}))
    elif name == "paper":
        # Who trains a network of the report as the paper would takes the paper of its family.
        paper = PAPER_OF_MEMBER.get(arch) or PAPER_OF.get(family.removeprefix("report-"))
        if paper is None:
            raise UsageError(f"there is no paper on {arch}: choose the recipe fast, or report")
        chosen = dict(paper)
    else:
        chosen = dict(REPORT, **REPORT_OF.get(family, {}))
    chosen["model_kwargs"] = {option: value for option, value in chosen.get("model_kwargs", {}).items()
                              if option not in architecture.settings}  # which its name has settled
    if dataset == "digits":
        chosen.update(DIGITS, **FAST_DIGITS if name == "fast" else {})
        if "val_split" in chosen:
            chosen["val_split"] = 143  # a tenth, as of CIFAR
    return dict(chosen, recipe=name)
