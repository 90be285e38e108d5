"""The faces as they were before the house grew: what users could import then they can import still, from there."""

import importlib

import pytest

FACES = {
    "jaxtransfer": """
        Average Context Fitted Forward Frozen FrozenModel InputError Interval Mean Model NonFiniteLossError
        Objective Report TrainState TrainStep Transferred barlow_twins byol cached classification crd data decoupled
        dino distillation ema eval_step evaluate evaluate_episodes fisher_diagonal fisher_l2_sp fit frozen info_nce
        init l2 l2_sp losses maml mean_teacher meta methods micro_batched moco models mutual_learning nnclr
        online_probe optim over_views peer regression representation shapes_of siglip simclr simsiam supcon swav
        train_step transfer tree vicreg
    """,
    "jaxtransfer.data": """
        Dataset EpisodeBatches Episodes Pipeline RIGHT_ANGLES TeacherCache attach_outputs augment available
        eval_batches fingerprint load open_outputs outputs_note pipeline prefetch_to_device split_classes views
        write_outputs
    """,
    "jaxtransfer.data.augment": """
        Rows compose cutout mixup normalize random_crop random_flip
    """,
    "jaxtransfer.data.views": """
        augmented chain color_jitter gaussian_blur greyscale many_views random_crop random_flip random_resized_crop
        simclr solarize sometimes two_views
    """,
    "jaxtransfer.losses": """
        CRDMemory attention_transfer barlow_twins batch_all batch_hard class_weights correlation_congruence crd
        crd_memory cross_entropy dcl dino dino_center dist dkd fisher_l2_sp fsp gaussian_correlation hint info_nce
        kd l2 l2_sp mined_triplet negative_cosine nst nt_xent pkt review_kd rkd_angle rkd_distance semi_hard siglip
        similarity_preserving sinkhorn squared_error standardize_logits supcon swav top_k triplet vicreg vid
    """,
    "jaxtransfer.meta": """
        Embedded Statistics adapt baseline_plus_plus cosine_classification cosine_distance few_shot implicit_maml
        linear_head maml matching mean_features per_layer_and_step per_parameter per_step per_task prototypical r2d2
        relation reptile ridge_weights running score_error simpleshot squared_euclidean transductive
    """,
    "jaxtransfer.methods": """
        Stage anchored discriminative full gradual linear_probe lp_ft
    """,
    "jaxtransfer.models": """
        Entry adapters cifar_resnet conv4 count_parameters create encoder_of equinox from_torch head linen mlp nnx
        normalize relation_net resnet resnet101 resnet110 resnet18 resnet20 resnet32 resnet34 resnet44 resnet50
        resnet56 small_cnn vgg vgg11 vgg13 vgg16 vgg19 vit vit_b vit_s vit_ti wide_resnet with_heads
    """,
    "jaxtransfer.models.adapters": """
        Regressor Review Variational regressor review variational
    """,
    "jaxtransfer.optim": """
        Still by_path freeze gradual_unfreeze held_still kernels layerwise_decay only scale_rate
    """,
    "jaxtransfer.representation": """
        Embedded alignment embed embed_views embedder knn_accuracy linear_probe neighbours plot_embedding
        recall_at_k uniformity
    """,
    "jaxtransfer.train": """
        Fitted Interval TrainState TrainStep eval_step evaluate evaluate_episodes fit init train_step
    """,
    "jaxtransfer.tree": """
        Differences as_patterns check_arrays check_used count differences label leaves_by_path listed mask matched
        matches nested path_of
    """,
    "jaxtransfer.objective": """
        Batch Context Mean Objective fresh named_key view_of
    """,
    "jaxtransfer.model": """
        Model given
    """,
    "jaxtransfer.forward": """
        Average Forward Frozen FrozenModel ema frozen
    """,
    "jaxtransfer.errors": """
        InputError NonFiniteLossError unknown
    """,
    "jaxtransfer.outputs": """
        pick shapes_of
    """,
    "jaxtransfer.surgery": """
        Report Transferred transfer
    """,
    "jaxtransfer.report": """
        evaluation plot_curves print_table save_figure table write_report
    """,
    "jaxtransfer.micro_batches": """
        micro_batched
    """,
}


@pytest.mark.parametrize("module", FACES)
def test_a_public_name_stays(module):
    face = importlib.import_module(module)
    gone = [name for name in FACES[module].split() if not hasattr(face, name)]
    assert not gone, f"{module} lost {gone}"
