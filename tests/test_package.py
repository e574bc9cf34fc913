"""What importing the package does, and what it leaves alone. Each in a fresh process."""

import subprocess
import sys

from conftest import DATA


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_import_makes_mesh_tensorflow_importable_and_is_silent():
    done = run(
        "import gpt_neo_sampling, mesh_tensorflow as mtf\n"
        "assert mtf.Dimension('x', 2).size == 2\n"
        "import sys; assert 'mesh_tensorflow.transformer' not in sys.modules\n"
    )
    assert done.stdout == done.stderr == ""


def test_import_leaves_tensorflow_as_it_was():
    run(
        "import os, tensorflow as tf\n"
        "import tensorflow.compat.v1 as tf1\n"
        "from tensorflow.python.framework import ops\n"
        "look = lambda: (tf.executing_eagerly(), tf1.control_flow_v2_enabled(), tf1.resource_variables_enabled(),\n"
        "                hasattr(tf1, 'estimator'), hasattr(ops, 'register_tensor_conversion_function'),\n"
        "                tf1.get_seed(None), tf1.get_logger().level, dict(os.environ))\n"
        "before = look()\n"
        "import gpt_neo_sampling\n"
        "assert look() == before, (before, look())\n"
    )


def test_import_leaves_no_log_level_behind():
    run(
        "import os\n"
        "import gpt_neo_sampling\n"
        "assert 'TF_CPP_MIN_LOG_LEVEL' not in os.environ or os.environ['TF_CPP_MIN_LOG_LEVEL'] == '1'\n"
    )


def test_a_failed_import_of_mesh_tensorflow_does_no_harm():
    """On TensorFlow 2.13 and later a bare import fails; ours works after it all the same."""
    run(
        "try:\n"
        "    import mesh_tensorflow\n"
        "except (ImportError, AttributeError):\n"
        "    pass\n"
        "import gpt_neo_sampling, mesh_tensorflow\n"
        "mesh_tensorflow.Graph()\n"
    )


def test_generating_leaves_the_callers_graph_and_seed_alone():
    run(
        "import tensorflow.compat.v1 as tf, random\n"
        "import numpy as np\n"
        "from gpt_neo_sampling import TextGenerator\n"
        "random.seed(1); np.random.seed(1)\n"
        "states = random.getstate(), np.random.get_state()[1].tolist()\n"
        "with tf.Graph().as_default() as graph:\n"
        f"    generator = TextGenerator.from_pretrained({str(DATA / 'gpt_neo_checkpoints' / 'global')!r})\n"
        "    generator.generate([[5, 6]], max_new_tokens=2)\n"
        "    assert tf.get_default_graph() is graph and not graph.get_operations()\n"
        "assert (random.getstate(), np.random.get_state()[1].tolist()) == states\n"
    )


def test_public_names_are_there():
    import gpt_neo_sampling

    for name in gpt_neo_sampling.__all__:
        assert getattr(gpt_neo_sampling, name).__doc__
