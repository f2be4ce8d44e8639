"""Models of other libraries, as small as they are made: tables from a name to a function that returns the model and its inputs.

`SEGMENTATION` and `VIDEO` have torchvision's (and segmentation_models_pytorch's), `LIBRARIES` the rest. A third member,
a mapping, says
`batch: False` where axis 0 of the inputs is no batch, or `wrt`, the embedding that maps are of. A library that is not installed
raises `ModuleNotFoundError` when the function is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import breadth_sequences as sequences
import torch
from breadth_parts import Part, ids, noise, of
from torch import Tensor, nn

# -- torchvision ---------------------------------------------------------------------------------------------------------------


def torchvision_model(name: str, x: tuple[int, ...], **options: Any) -> tuple:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options).eval(), (noise(*x),)


def tv(name: str, *x: int, **options: Any) -> Callable[[], tuple]:
    return functools.partial(torchvision_model, name, x or (2, 3, 64, 64), **options)


def detector(name: str, **options: Any) -> tuple:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)
    return model.eval(), ([noise(3, 64, 64).sigmoid()],), {"batch": False}


def part(name: str, function: Callable[..., Any], **options: Any) -> tuple:
    """A detector's network without its boxes."""
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)
    return Part(model.eval(), function), (noise(2, 3, 64, 64),)


def raft(name: str) -> tuple:
    model, _ = torchvision_model(name, (1,))
    return model, (noise(1, 3, 128, 128), noise(1, 3, 128, 128, seed=1))


def pyramid(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(model.backbone(x).values())  # type: ignore[operator, union-attr]


B = {"weights_backbone": None}
SEGMENTATION: dict[str, Callable[[], tuple]] = {
    "fcn_resnet50": tv("fcn_resnet50", **B),
    "fcn_resnet50-aux": tv("fcn_resnet50", **B, aux_loss=True),
    "fcn_resnet101": tv("fcn_resnet101", **B),
    "deeplabv3_resnet50": tv("deeplabv3_resnet50", **B),
    "deeplabv3_resnet101": tv("deeplabv3_resnet101", **B),
    "deeplabv3_mobilenet_v3_large": tv("deeplabv3_mobilenet_v3_large", **B),
    "lraspp_mobilenet_v3_large": tv("lraspp_mobilenet_v3_large", **B),
}
VIDEO: dict[str, Callable[[], tuple]] = {
    "r3d_18": tv("r3d_18", 2, 3, 4, 32, 32),
    "mc3_18": tv("mc3_18", 2, 3, 4, 32, 32),
    "r2plus1d_18": tv("r2plus1d_18", 2, 3, 4, 32, 32),
    "s3d": tv("s3d", 1, 3, 16, 224, 224),
    "mvit_v1_b": tv("mvit_v1_b", 1, 3, 16, 224, 224),
    "mvit_v2_s": tv("mvit_v2_s", 1, 3, 16, 224, 224),
    "swin3d_t": tv("swin3d_t", 1, 3, 4, 32, 32),
}
TORCHVISION: dict[str, Callable[[], tuple]] = {
    **{name: functools.partial(detector, name) for name in (
        "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large")},
    "retinanet-raw": functools.partial(part, "retinanet_resnet50_fpn", lambda m, x: m.head(pyramid(m, x))),
    "ssdlite-raw": functools.partial(part, "ssdlite320_mobilenet_v3_large", lambda m, x: m.head(pyramid(m, x))),
    "fasterrcnn-rpn-raw": functools.partial(part, "fasterrcnn_resnet50_fpn", lambda m, x: m.rpn.head(pyramid(m, x))),
    "raft_small": functools.partial(raft, "raft_small"),
    "raft_large": functools.partial(raft, "raft_large"),
    "vgg11-cls": tv("vgg11", 2, 3, 64, 64),
}  # fmt: skip

# -- segmentation_models_pytorch -----------------------------------------------------------------------------------------------


def smp(architecture: str, encoder: str, side: int = 64, **options: Any) -> tuple:
    import segmentation_models_pytorch as library

    return getattr(library, architecture)(encoder, encoder_weights=None, classes=3, **options).eval(), (noise(2, 3, side, side),)


for _name, _encoder in (("Unet", "resnet18"), ("Unet", "efficientnet-b0"), ("Unet", "mobilenet_v2"), ("Unet", "mit_b0"),
                        ("UnetPlusPlus", "resnet18"), ("PSPNet", "resnet18"), ("DeepLabV3Plus", "resnet18"), ("PAN", "resnet18"),
                        ("UPerNet", "resnet18"), ("Segformer", "mit_b0")):  # fmt: skip
    SEGMENTATION[f"smp-{_name}-{_encoder}"] = functools.partial(smp, _name, _encoder, 128 if _name == "PAN" else 64)
SEGMENTATION |= {
    "smp-DPT-tu-vit_tiny_patch16_224": functools.partial(smp, "DPT", "tu-vit_tiny_patch16_224", 224),
    "smp-Unet-scse-attn": functools.partial(smp, "Unet", "resnet18", decoder_attention_type="scse"),
    "smp-Unet-aux": functools.partial(smp, "Unet", "resnet18", aux_params={"classes": 3}),
}

# -- pictures and volumes ------------------------------------------------------------------------------------------------------

CLIP_TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
CLIP_VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
CLIP_RN = {"image_size": 64, "width": 8, "layers": [1, 1, 1, 1], "head_width": 64}


def open_clip(vision: dict[str, Any], visual: bool = False, **options: Any) -> tuple:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    model = CLIP(32, CLIPVisionCfg(**vision), CLIPTextCfg(**CLIP_TEXT), **options).eval()
    x = noise(2, 3, vision["image_size"], vision["image_size"])
    return (model.visual, (x,)) if visual else (model, (x, ids(2, 16)))


def monai(name: str, x: tuple[int, ...] = (1, 1, 32, 32, 32), **options: Any) -> Callable[[], tuple]:
    return of("monai.networks.nets", name, x=x, **options)


def monai_diffusion() -> tuple:
    model, x = monai("DiffusionModelUNet", (2, 1, 16, 16), spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16),
                     attention_levels=(False, True), num_res_blocks=1, num_head_channels=8, norm_num_groups=8)()  # fmt: skip
    return model, (*x, torch.tensor([3, 7]))


def voxelmorph() -> tuple:
    model, x = monai("VoxelMorph", (1, 1, 32, 32, 32))()
    return model, (*x, noise(1, 1, 32, 32, 32, seed=1))


VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48}
vitp = functools.partial(of, "vit_pytorch")
PICTURES: dict[str, Callable[[], tuple]] = {
    "openclip-vit": functools.partial(open_clip, CLIP_VIT),
    "openclip-vit-quickgelu": functools.partial(open_clip, CLIP_VIT, quick_gelu=True),
    "openclip-rn": functools.partial(open_clip, CLIP_RN),
    "openclip-visual": functools.partial(open_clip, CLIP_VIT, visual=True),
    "openclip-visual-rn": functools.partial(open_clip, CLIP_RN, visual=True),
    "monai-UNet": monai("UNet", spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2),
        num_res_units=1),
    "monai-DynUNet": monai("DynUNet", spatial_dims=3, in_channels=1, out_channels=2, kernel_size=[3, 3, 3], strides=[1, 2, 2],
                           upsample_kernel_size=[2, 2], filters=[4, 8, 16]),
    "monai-SegResNet": monai("SegResNet", spatial_dims=3, in_channels=1, out_channels=2, init_filters=8),
    "monai-UNETR": monai("UNETR", in_channels=1, out_channels=2, img_size=32, feature_size=4, hidden_size=32, mlp_dim=48,
        num_heads=4),
    "monai-SwinUNETR": monai("SwinUNETR", (1, 1, 64, 64, 64), in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1),
                             num_heads=(1, 1, 2, 2)),
    "monai-VNet": monai("VNet", spatial_dims=3, in_channels=1, out_channels=2),
    "monai-BasicUNetPlusPlus": monai("BasicUNetPlusPlus", spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 8, 8,
        16, 4)),
    "monai-EfficientNetBN": monai("EfficientNetBN", (2, 3, 64, 64), model_name="efficientnet-b0", pretrained=False),
    "monai-ViT": monai("ViT", (2, 1, 32, 32), in_channels=1, img_size=32, patch_size=8, hidden_size=32, mlp_dim=48, num_layers=2,
                       num_heads=4, classification=True, spatial_dims=2),
    "monai-AutoencoderKL": monai("AutoencoderKL", (2, 1, 16, 16), spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16),
                                 num_res_blocks=(1, 1), attention_levels=(False, True), latent_channels=2, norm_num_groups=8),
    "monai-ResNet3d": monai("resnet18", spatial_dims=3, n_input_channels=1, num_classes=3),
    "monai-DenseNet121": monai("DenseNet121", (2, 1, 64, 64), spatial_dims=2, in_channels=1, out_channels=3),
    "monai-DiffusionUNet": monai_diffusion,
    "monai-VoxelMorph": voxelmorph,
    "vitp-vit": vitp("ViT", **VIT),
    "vitp-simple_vit": vitp("SimpleViT", **VIT),
    "vitp-deepvit": of("vit_pytorch.deepvit", "DeepViT", **VIT),
    "vitp-cait": of("vit_pytorch.cait", "CaiT", **VIT, cls_depth=1),
    "vitp-cct": of("vit_pytorch.cct", "CCT", img_size=32, embedding_dim=32, n_conv_layers=1, kernel_size=7, stride=2, padding=3,
                   num_layers=2, num_heads=4, mlp_ratio=2.0, num_classes=5),
    "vitp-cross_vit": of("vit_pytorch.cross_vit", "CrossViT", image_size=32, num_classes=5, sm_dim=16, lg_dim=32, sm_patch_size=8,
                         lg_patch_size=16, depth=1),
    "vitp-levit": of("vit_pytorch.levit", "LeViT", image_size=32, num_classes=5, stages=1, dim=(16,), depth=2, heads=(2,),
        mlp_mult=2),
    "vitp-cvt": of("vit_pytorch.cvt", "CvT", num_classes=5, s1_emb_dim=8, s2_emb_dim=16, s3_emb_dim=24, s2_heads=2, s3_heads=3,
                   s3_depth=1, x=(2, 3, 64, 64)),
    "vitp-twins_svt": of("vit_pytorch.twins_svt", "TwinsSVT", num_classes=5, s1_emb_dim=8, s1_local_patch_size=2, s2_emb_dim=8,
                         s2_local_patch_size=2, s3_emb_dim=8, s3_local_patch_size=2, s3_depth=1, s4_emb_dim=8,
                         s4_local_patch_size=2,
                         s4_depth=1, s1_patch_size=2, s1_global_k=2, s2_global_k=2, s3_global_k=2, s4_global_k=2),
    "vitp-regionvit": of("vit_pytorch.regionvit", "RegionViT", dim=(8, 8, 16, 16), depth=(1, 1, 1, 1), window_size=2,
        num_classes=5,
                         x=(2, 3, 64, 64)),
    "vitp-max_vit": of("vit_pytorch.max_vit", "MaxViT", num_classes=5, dim=16, depth=(1, 1), window_size=4, dim_head=8,
        dim_conv_stem=8,
                       x=(2, 3, 32, 32)),
    "vitp-mobile_vit": of("vit_pytorch.mobile_vit", "MobileViT", image_size=(64, 64), dims=[16, 24, 32], num_classes=5,
                          channels=[8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 48], x=(2, 3, 64, 64)),
    "vitp-t2t": of("vit_pytorch.t2t", "T2TViT", dim=32, image_size=32, depth=1, heads=2, mlp_dim=48, num_classes=5,
                   t2t_layers=((7, 4), (3, 2))),
    "vitp-normalized_vit": of("vit_pytorch.normalized_vit", "nViT", **VIT, dim_head=8),
    "vitp-vivit": of("vit_pytorch.vivit", "ViViT", image_size=32, image_patch_size=8, frames=4, frame_patch_size=2, num_classes=5,
        dim=32,
                     spatial_depth=1, temporal_depth=1, heads=4, mlp_dim=48, x=(2, 3, 4, 32, 32)),
    "efficientnet_pytorch-b0": lambda: efficientnet(True),
    "efficientnet_pytorch-b0-plainswish": lambda: efficientnet(False),
    "facenet-classify": of("facenet_pytorch", "InceptionResnetV1", classify=True, num_classes=5, x=(2, 3, 96, 96)),
    "facenet-embed": of("facenet_pytorch", "InceptionResnetV1", x=(2, 3, 96, 96)),
    "facenet-ONet": of("facenet_pytorch.models.mtcnn", "ONet", pretrained=False, x=(2, 3, 48, 48)),
    "cadene-inceptionv4": of("pretrainedmodels", "inceptionv4", pretrained=None, x=(2, 3, 299, 299)),
    "cadene-nasnetamobile": of("pretrainedmodels", "nasnetamobile", pretrained=None, x=(1, 3, 224, 224)),
    "cadene-se_resnet50": of("pretrainedmodels", "se_resnet50", pretrained=None, x=(1, 3, 224, 224)),
    "cadene-bninception": of("pretrainedmodels", "bninception", pretrained=None, x=(1, 3, 224, 224)),
    "cadene-xception": of("pretrainedmodels", "xception", pretrained=None, x=(1, 3, 224, 224)),
    "xrv-densenet": of("torchxrayvision.models", "DenseNet", weights=None, x=(2, 1, 64, 64)),
    "kornia-HardNet": of("kornia.feature", "HardNet", pretrained=False, x=(2, 1, 32, 32)),
    **{f"yolo-{name}": functools.partial(lambda name: yolo(name), name)
       for name in ("yolo11n", "yolov8n-cls", "yolo11n-cls", "yolo11n-seg", "yolo11n-pose", "yolov10n")},
}  # fmt: skip


def efficientnet(own: bool) -> tuple:
    from efficientnet_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-b0", num_classes=5)
    model.set_swish(memory_efficient=own)
    return model.eval(), (noise(2, 3, 64, 64),)


def yolo(name: str) -> tuple:
    import ultralytics.nn.tasks as tasks

    task = {"cls": "ClassificationModel", "seg": "SegmentationModel", "pose": "PoseModel"}.get(
        name.rpartition("-")[2], "DetectionModel"
    )
    return getattr(tasks, task)(f"{name}.yaml", verbose=False).eval(), (noise(2, 3, 64, 64),)


LIBRARIES = {**TORCHVISION, **PICTURES, **sequences.SEQUENCES}
