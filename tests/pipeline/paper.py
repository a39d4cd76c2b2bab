"""What the papers print, as plain data, for the recipes and their documentation to be compared with.

Written from the papers and their authors' accounts, never from a recipe. Accuracies are top-1, per cent, in the order
of ``DATA``; a run is named by the recipe that stands for it.
"""

DATA = ("ImageNet", "ReaL", "CIFAR-10", "CIFAR-100", "Pets", "Flowers")

# Table 2: means of 3 fine-tuning runs; the last is VTAB, the mean of its 19 tasks.
TABLE_2 = {
    "vit_h14_jft300m": (88.55, 90.72, 99.50, 94.55, 97.56, 99.68, 77.63),
    "vit_l16_jft300m_14ep": (87.76, 90.54, 99.42, 93.90, 97.32, 99.74, 76.28),
    "vit_l16_imagenet21k": (85.30, 88.62, 99.15, 93.25, 94.67, 99.61, 72.72),
    "bit_l_r152x4_jft300m": (87.54, 90.54, 99.37, 93.51, 96.62, 99.63, 76.29),
}  # fmt: skip

# Table 2: TPUv3-core-days.
CORE_DAYS = {
    "vit_h14_jft300m": "2.5k",
    "vit_l16_jft300m_14ep": "0.68k",
    "vit_l16_imagenet21k": "0.23k",
    "bit_l_r152x4_jft300m": "9.9k",
}  # fmt: skip

HARDWARE = {name: f"TPUv3, {days} core-days" for name, days in CORE_DAYS.items()}  # of others nothing is printed

# Table 5: fine-tuned at 384 px.
TABLE_5 = {
    "vit_b16_imagenet": (77.91, 83.57, 98.13, 87.13, 93.81, 89.49),
    "vit_b32_imagenet": (73.38, 79.56, 97.77, 86.31, 92.04, 85.43),
    "vit_l16_imagenet": (76.53, 82.19, 97.86, 86.35, 93.64, 89.66),
    "vit_l32_imagenet": (71.16, 77.83, 97.94, 87.07, 91.35, 86.36),
    "vit_b16_imagenet21k": (83.97, 88.35, 98.95, 91.67, 94.43, 99.38),
    "vit_b32_imagenet21k": (81.28, 86.63, 98.79, 91.97, 93.02, 99.11),
    "vit_l16_imagenet21k": (85.15, 88.40, 99.16, 93.44, 94.73, 99.61),
    "vit_l32_imagenet21k": (80.99, 85.65, 99.13, 93.04, 93.09, 99.19),
    "vit_h14_imagenet21k": (85.13, 88.70, 99.27, 93.82, 94.82, 99.51),
    "vit_b16_jft300m": (84.15, 88.85, 99.00, 91.87, 95.80, 99.56),
    "vit_b32_jft300m": (80.73, 86.27, 98.61, 90.49, 93.40, 99.27),
    "vit_l16_jft300m_14ep": (87.12, 89.99, 99.38, 94.04, 97.11, 99.56),
    "vit_l32_jft300m": (84.37, 88.28, 99.19, 92.52, 95.83, 99.45),
    "vit_h14_jft300m": (88.04, 90.33, 99.50, 94.55, 97.56, 99.68),
}  # fmt: skip

# Table 6: epochs on JFT-300M, accuracies fine-tuned at 384 px, exaFLOPs of the pre-training.
TABLE_6 = {
    "vit_b32_jft300m": (7, (80.73, 86.27, 98.61, 90.49, 93.40, 99.27), 55),
    "vit_b16_jft300m": (7, (84.15, 88.85, 99.00, 91.87, 95.80, 99.56), 224),
    "vit_l32_jft300m": (7, (84.37, 88.28, 99.19, 92.52, 95.83, 99.45), 196),
    "vit_l16_jft300m": (7, (86.30, 89.43, 99.38, 93.46, 96.81, 99.66), 783),
    "vit_l16_jft300m_14ep": (14, (87.12, 89.99, 99.38, 94.04, 97.11, 99.56), 1567),
    "vit_h14_jft300m": (14, (88.08, 90.36, 99.50, 94.71, 97.11, 99.71), 4262),
    "bit_r50x1_jft300m": (7, (77.54, 84.56, 97.67, 86.07, 91.11, 94.26), 50),
    "bit_r50x2_jft300m": (7, (82.12, 87.94, 98.29, 89.20, 93.43, 97.02), 199),
    "bit_r101x1_jft300m": (7, (80.67, 87.07, 98.48, 89.17, 94.08, 95.95), 96),
    "bit_r152x1_jft300m": (7, (81.88, 87.96, 98.82, 90.22, 94.17, 96.94), 141),
    "bit_r152x2_jft300m": (7, (84.97, 89.69, 99.06, 92.05, 95.37, 98.62), 563),
    "bit_r152x2_jft300m_14ep": (14, (85.56, 89.89, 99.24, 91.92, 95.75, 98.75), 1126),
    "bit_r200x3_jft300m": (14, (87.22, 90.15, 99.34, 93.53, 96.32, 99.04), 3306),
    "r50_vit_b32_jft300m": (7, (84.90, 89.15, 99.01, 92.24, 95.75, 99.46), 106),
    "r50_vit_b16_jft300m": (7, (85.58, 89.65, 99.14, 92.63, 96.65, 99.40), 274),
    "r50_vit_l32_jft300m": (7, (85.68, 89.04, 99.24, 92.93, 96.97, 99.43), 246),
    "r50_vit_l16_jft300m": (7, (86.60, 89.72, 99.18, 93.64, 97.03, 99.40), 859),
    "r50_vit_l16_jft300m_14ep": (14, (87.12, 89.76, 99.31, 93.89, 97.36, 99.11), 1668),
}  # fmt: skip

# Table 7: ResNets trained with SGD; ImageNet, CIFAR-10, CIFAR-100, Pets, Flowers. With Adam they are those of Table 6.
TABLE_7 = {
    "bit_r50x1_jft300m": (77.54, 97.67, 86.07, 91.11, 94.26),
    "bit_r50x1_jft300m_sgd": (78.24, 97.46, 85.17, 91.00, 92.06),
    "bit_r152x2_jft300m": (84.97, 99.06, 92.05, 95.37, 98.62),
    "bit_r152x2_jft300m_sgd": (84.37, 99.07, 91.06, 94.79, 99.32),
}

# Table 8: ImageNet 5-shot accuracy of ViT-B/16 without position embeddings; with 1-D, then 2-D ones at the stem, at
# every layer, at every layer shared; with relative ones.
TABLE_8 = [0.61382, 0.64206, 0.63964, 0.64292, 0.64001, 0.64046, 0.64022, 0.64032]

# Table 3: epochs, learning rate, shape of its decay, weight decay, dropout. The last three have results in Tables 5 and
# 6, and no row: they are as their likes.
TABLE_3 = {
    "vit_b16_jft300m": (7, 8e-4, "linear", 0.1, 0.0), "vit_b32_jft300m": (7, 8e-4, "linear", 0.1, 0.0),
    "vit_l32_jft300m": (7, 6e-4, "linear", 0.1, 0.0), "vit_l16_jft300m": (7, 4e-4, "linear", 0.1, 0.0),
    "vit_l16_jft300m_14ep": (14, 4e-4, "linear", 0.1, 0.0), "vit_h14_jft300m": (14, 3e-4, "linear", 0.1, 0.0),
    "bit_r50x1_jft300m": (7, 1e-3, "linear", 0.1, 0.0), "bit_r50x2_jft300m": (7, 1e-3, "linear", 0.1, 0.0),
    "bit_r101x1_jft300m": (7, 8e-4, "linear", 0.1, 0.0), "bit_r152x1_jft300m": (7, 6e-4, "linear", 0.1, 0.0),
    "bit_r152x2_jft300m": (7, 6e-4, "linear", 0.1, 0.0), "r50_vit_b16_jft300m": (7, 8e-4, "linear", 0.1, 0.0),
    "r50_vit_b32_jft300m": (7, 8e-4, "linear", 0.1, 0.0), "r50_vit_l32_jft300m": (7, 2e-4, "linear", 0.1, 0.0),
    "r50_vit_l16_jft300m": (7, 4e-4, "linear", 0.1, 0.0), "r50_vit_l16_jft300m_14ep": (14, 4e-4, "linear", 0.1, 0.0),
    "vit_b16_imagenet21k": (90, 1e-3, "linear", 0.03, 0.1), "vit_b32_imagenet21k": (90, 1e-3, "linear", 0.03, 0.1),
    "vit_l16_imagenet21k": (90, 1e-3, "linear", 0.03, 0.1), "vit_l16_imagenet21k_30ep": (30, 1e-3, "linear", 0.03, 0.1),
    "vit_l32_imagenet21k": (90, 1e-3, "linear", 0.03, 0.1), "vit_l32_imagenet21k_30ep": (30, 1e-3, "linear", 0.03, 0.1),
    "vit_b16_imagenet": (300, 3e-3, "cosine", 0.3, 0.1), "vit_b32_imagenet": (300, 3e-3, "cosine", 0.3, 0.1),
    "vit_l16_imagenet": (300, 3e-3, "cosine", 0.3, 0.1), "vit_l32_imagenet": (300, 3e-3, "cosine", 0.3, 0.1),
    "bit_r152x2_jft300m_14ep": (14, 6e-4, "linear", 0.1, 0.0), "bit_r200x3_jft300m": (14, 6e-4, "linear", 0.1, 0.0),
    "vit_h14_imagenet21k": (90, 1e-3, "linear", 0.03, 0.1),
}  # fmt: skip
ADAM = {"optim.name": "adamw", "optim.betas": (0.9, 0.999), "optim.decay": "all"}  # flax.optim.Adam 0.3.4 decays all
IMAGES = {"jft300m": 303_000_000, "imagenet21k": 14_200_000, "imagenet": 1_281_167}

NAMES = {"jft300m": "JFT-300M", "imagenet21k": "ImageNet-21k", "imagenet": "ImageNet"}
CLASSES = {
    "JFT-300M": 18_291, "ImageNet-21k": 21_843, "ImageNet": 1000, "CIFAR-10": 10, "CIFAR-100": 100, "Pets": 37,
    "Flowers": 102,
}  # fmt: skip

# The head's first bias, and the loss, by what a run trains on: accounts of the authors, and their later code.
HEAD_BIAS = {"jft300m": -10.0, "imagenet21k": -10.0, "imagenet": -6.9}
LOSS = "sigmoid"
END_OF_LINEAR = 1e-5
REPRESENTATION = True  # of ViTs and hybrids: the hidden layer with tanh

# Table 4: steps, learning rates, steps of warm-up (of the authors' code, not of the paper).
TABLE_4 = {
    "finetune_imagenet": (20_000, [0.003, 0.01, 0.03, 0.06], 500),
    "finetune_cifar100": (10_000, [0.001, 0.003, 0.01, 0.03], 500),
    "finetune_cifar10": (10_000, [0.001, 0.003, 0.01, 0.03], 500),
    "finetune_pets": (500, [0.001, 0.003, 0.01, 0.03], 100),
    "finetune_flowers": (500, [0.001, 0.003, 0.01, 0.03], 100),
    "finetune_vtab": (2_500, [0.01], 500),
}

# VTAB's tasks, and those that BiT (appendix F) does not crop, and does not mirror.
VTAB = {
    "cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397", "patch_camelyon", "eurosat",
    "resisc45", "diabetic_retinopathy", "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori",
    "smallnorb_azi", "smallnorb_ele",
}  # fmt: skip
VTAB_WHOLE = {"clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc"}
VTAB_UPRIGHT = {"dsprites_ori", "smallnorb_azi", "dsprites_loc"}

# At the end of pre-training: on ImageNet-21k's validation images, and on ImageNet at 224 px.
UPSTREAM = {
    "vit_b16_imagenet21k": 47.88, "vit_b32_imagenet21k": 44.04, "vit_l16_imagenet21k": 49.90,
    "vit_l32_imagenet21k": 45.42, "vit_h14_imagenet21k": 49.06,
    "vit_b32_imagenet": 69.19, "vit_b16_imagenet": 74.79, "vit_l32_imagenet": 66.90, "vit_l16_imagenet": 72.59,
}  # fmt: skip

# The official code and its released weights, without dropout: CIFAR-10, CIFAR-100, ImageNet.
OFFICIAL_CODE = {
    "vit_b16_imagenet21k": (99.02, 92.06, 84.53), "vit_b32_imagenet21k": (98.88, 92.31, 81.66),
    "vit_l16_imagenet21k": (99.13, 92.91, 84.47), "vit_l32_imagenet21k": (99.06, 93.29, 81.89),
}  # fmt: skip

# Appendix B.1.2 and 4.6; of the corrupted half 10 % more are left as they are. Decay and dropout are those of Table 3.
MASKED_PATCH = ADAM | {
    "kind": "masked_patch", "optim.weight_decay": 0.1, "optim.clip": None, "model.dropout": 0.0,
    "duration": "1_000_000 steps", "global_batch": 4096, "optim.lr": 2e-4, "schedule.warmup": "10_000 steps",
    "schedule.shape": "cosine", "masked_patch.share": 0.5, "masked_patch.mask": 0.8, "masked_patch.other": 0.1,
    "masked_patch.target": "mean_color", "model.name": "vit_b16", "schedule.end_lr": 0.0, "data.augment": "inception",
    "loss": "softmax",
}  # fmt: skip
MASKED_PATCH_IMAGENET = 79.9

# BiT: upstream, with SGD. Rate for a batch of 256; epochs in all, and after which the rate goes down tenfold.
BIT = {
    "optim.name": "sgd", "optim.momentum": 0.9, "optim.lr": 0.03 * 4096 / 256, "global_batch": 4096,
    "schedule.warmup": "5_000 steps", "schedule.factor": 0.1, "optim.weight_decay": 1e-4, "data.augment": "inception",
    "schedule.shape": "steps", "optim.clip": None, "optim.decay": "all",
}  # fmt: skip
BIT_EPOCHS = {
    "bit_s_r50x1_imagenet": (90, [30, 60, 80]), "bit_m_r50x1_imagenet21k": (90, [30, 60, 80]),
    "bit_l_r152x4_jft300m": (40, [10, 23, 30, 37]),
}  # fmt: skip
BIT_LOSS = {"imagenet": ("softmax", 0.0), "imagenet21k": ("sigmoid", -10.0), "jft300m": ("sigmoid", -10.0)}
# BiT-HyperRule: steps of the end of warm-up, of going down, of the end; larger side and crop; mixup.
HYPERRULE = {
    "optim.lr": 0.003, "optim.clip": None, "data.augment": "resize_crop", "schedule.shape": "steps",
    "schedule.factor": 0.1,
}  # fmt: skip
HYPERRULES = {
    "bit_hyperrule_500": ([100, 200, 300, 400, 500], (512, 480), 0.0),
    "bit_hyperrule_10k": ([500, 3000, 6000, 9000, 10000], (160, 128), 0.1),
    "bit_hyperrule_20k": ([500, 6000, 12000, 18000, 20000], (512, 480), 0.1),
}
BIT_RESNET50 = {"ImageNet": 76.0, "VTAB": 70.39}  # GroupNorm and weight standardisation, of BiT's Tables 4 and 5

# AugReg: what all runs share, and what its grid tries (augmentation as layers, magnitude, mixup).
AUGREG = {
    "optim.name": "adamw", "optim.betas": (0.9, 0.999), "global_batch": 4096, "schedule.shape": "cosine",
    "schedule.warmup": "10_000 steps", "schedule.end_lr": 0.0, "optim.lr": 1e-3, "optim.clip": 1.0, "loss": "sigmoid",
    "optim.decay": "kernels",
}  # fmt: skip
AUGREG_MODELS = {
    "vit_l16": 85.59, "vit_b16": 85.49, "vit_s16": 83.73, "r50_vit_l32": 85.99, "r26_vit_s32": 83.85,
    "vit_ti16": 78.22, "vit_b32": 83.59, "vit_s32": 79.58, "r_vit_ti16": 75.40,
}  # fmt: skip
AUGREG_AUGMENTS = {
    "inception": (0, 0, 0.0), "light1": (2, 0, 0.0), "light2": (2, 10, 0.2), "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5), "strong1": (2, 20, 0.5), "strong2": (2, 20, 0.8),
}  # fmt: skip
AUGREG_DECAYS = [0.1, 0.03]
AUGREG_DROPS = {(0.0, 0.0), (0.1, 0.1)}
AUGREG_EPOCHS = {"augreg_imagenet": [300], "augreg_imagenet21k": [30, 300]}
AUGREG_IMAGENET = 79  # ViT-B/16 from nothing, about
# Its fine-tuning: rates, and steps with their warm-up.
AUGREG_FINETUNE = {
    "augreg_finetune_imagenet": ([0.01, 0.03], {(20_000, 500)}),
    "augreg_finetune_cifar100": ([0.001, 0.003, 0.01], {(2_500, 200), (10_000, 500)}),
    "augreg_finetune_pets": ([0.001, 0.003, 0.01], {(500, 100), (2_500, 200)}),
}

# Better plain ViT baselines: ViT-S/16.
SIMPLE = {
    "global_batch": 1024, "model.name": "vit_s16", "model.pooling": "mean", "model.position": "sincos_2d",
    "model.representation": True, "model.dropout": 0.0, "model.drop_path": None, "model.head_bias": None,
    "data.augment": "light2", "loss": "softmax", "optim.name": "adamw", "optim.betas": (0.9, 0.999), "optim.lr": 1e-3,
    "optim.weight_decay": 0.1, "optim.decay": "kernels", "optim.clip": 1.0, "schedule.shape": "cosine",
    "schedule.warmup": "10_000 steps", "schedule.end_lr": 0.0, "evaluate.view": "center_crop",
}  # fmt: skip
SIMPLE_IMAGES = round(0.99 * 1_281_167)
# By epochs: top-1, ReaL, ImageNet v2.
SIMPLE_RESULTS = {
    "90 epochs": (76.5, 83.1, 64.2), "150 epochs": (78.5, 84.5, 66.4), "300 epochs": (80.0, 85.4, 68.3),
}  # fmt: skip

# Masked autoencoders: Table 8, pre-training, and section 3 and 4 for mask and decoder. The rates are for 256 images.
MAE = {
    "kind": "mae", "global_batch": 4096, "optim.name": "adamw", "optim.lr": 1.5e-4 * 4096 / 256,
    "optim.betas": (0.9, 0.95), "optim.weight_decay": 0.05, "schedule.shape": "cosine", "schedule.warmup": "40 epochs",
    "data.augment": "inception", "data.resolution": 224, "mae.share": 0.75, "mae.norm_pixels": True,
    "mae.decoder_depth": 8, "mae.decoder_dim": 512, "mae.decoder_heads": 16, "model.position": "sincos_2d_moco",
    "model.gelu": "exact", "model.dropout": 0.0, "data.crop_area": (0.2, 1.0), "optim.clip": None,
    "optim.decay": "kernels", "schedule.end_lr": 0.0,
}  # fmt: skip
MAE_EPOCHS = ["800 epochs", "1600 epochs"]
# Table 9, fine-tuning: epochs and stochastic depth of B, L and H.
MAE_FINETUNE = {
    "kind": "finetune", "global_batch": 1024, "optim.name": "adamw", "optim.lr": 1e-3 * 1024 / 256,
    "optim.betas": (0.9, 0.999), "optim.weight_decay": 0.05, "optim.layer_decay": 0.75, "schedule.shape": "cosine",
    "schedule.warmup": "5 epochs", "label_smoothing": 0.1, "data.mixup": 0.8, "data.resolution": 224,
    "data.augment": "light2", "data.crop_area": (0.08, 1.0), "loss": "softmax", "model.position": "learned",
    "optim.clip": None, "optim.decay": "kernels", "evaluate.view": "center_crop",
}  # fmt: skip
MAE_FINETUNE_SIZES = [("100 epochs", 0.1), ("50 epochs", 0.1), ("50 epochs", 0.2)]
MAE_IMAGENET = {"vit_b16": 83.6, "vit_l16": 85.9, "vit_h14": 86.9}  # Table 3
HARDWARE |= {
    "mae_imagenet": "64 V100 for 42 hours: ViT-L/16, 800 epochs",
    "mae_finetune_imagenet": "32 V100 for 7 hours: ViT-B/16",
}  # fmt: skip
MAE_LINEAR = {"vit_b16": 68.0, "vit_l16": 75.8, "vit_h14": 76.6}
