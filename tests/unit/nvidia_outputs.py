"""What nvidia-smi prints, asked as drydock asks it: of the H100 of docs/runs, with its name, memory and driver.

Its form is the real one's; the UUID and the memory in use are made up.
"""

UUID = "GPU-5a1a6a2e-7a5c-4c0e-9c39-4f0f6f0c2b11"
H100 = {
    "--query-gpu=index,uuid,name,memory.total,driver_version": (
        f"0, {UUID}, NVIDIA H100 80GB HBM3, 81559, 580.159.04\n"
    ),
    "--query-gpu=index,uuid,memory.used": f"0, {UUID}, 4\n",
    "--query-compute-apps=gpu_uuid,pid,process_name,used_memory": "",
}
"""Query -> output, with `--format=csv,noheader,nounits`."""
