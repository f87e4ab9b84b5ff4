"""What nvidia-smi prints, asked as drydock asks it: of the H100 of docs/runs, with its name, memory and driver.

Its form is the real one's; the UUID and the memory in use are made up.
"""

H100 = {
    "--query-gpu=name,memory.total,driver_version": "NVIDIA H100 80GB HBM3, 81559, 580.159.04\n",
    "--query-gpu=index,uuid,memory.used": "0, GPU-5a1a6a2e-7a5c-4c0e-9c39-4f0f6f0c2b11, 4\n",
    "--query-compute-apps=gpu_uuid,pid,process_name,used_memory": "",
}
"""Query -> output, with `--format=csv,noheader,nounits`."""
