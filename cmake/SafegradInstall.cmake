# SafegradInstall: what `cmake --install` and the Python wheel (pyproject.toml) put where; docs/install.md.
#
# In a wheel (SKBUILD) the prefix is the package's own folder, and what is not the program lies where
# the environment keeps such files.

set(share share)
if(SKBUILD)
  set(share "${SKBUILD_DATA_DIR}/share")
endif()

# LibTorch is found in the folder `torch` beside the prefix, as in a Python environment, and after that
# where it was at build time. USE_LINK_PATH: MPI, where it is not the system's.
set(beside "$ORIGIN/../..")
set_target_properties(safegrad PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON
  INSTALL_RPATH "${beside}/torch/lib;${LibTorch_ROOT}/lib")
install(TARGETS safegrad DESTINATION bin)
if(SAFEGRAD_HAS_CUDA)
  get_target_property(libraries safegrad_cuda BUILD_RPATH)
  set_target_properties(safegrad_cuda PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON
    INSTALL_RPATH "${beside}/torch/lib;${beside}/nvidia/cu13/lib;${beside}/nvidia/nccl/lib;${libraries}")
  install(TARGETS safegrad_cuda DESTINATION lib)
endif()

install(DIRECTORY configs DESTINATION "${share}/safegrad")
file(GLOB shapes benchmarks/*.json)
install(FILES ${shapes} DESTINATION "${share}/safegrad/shapes")
install(FILES LICENSE DESTINATION "${share}/safegrad")
install(FILES launch/completion.bash DESTINATION "${share}/bash-completion/completions" RENAME safegrad)
install(FILES launch/completion.zsh DESTINATION "${share}/zsh/site-functions" RENAME _safegrad)

# Installed scripts start the installed program. Slurm runs a copy of its script: PATH says where the rest is.
foreach(script local hosts mpirun.sh slurm.sbatch slurm-mpirun.sbatch)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "launch/${script}")
  file(READ "launch/${script}" text)
  string(REPLACE "\$here/../build/safegrad" "\$here/../../../bin/safegrad" text "${text}")
  string(REPLACE "build/safegrad" "safegrad" text "${text}")
  string(REPLACE "\$SLURM_SUBMIT_DIR/launch" "\$(dirname \"\$(command -v safegrad)\")/../share/safegrad/launch" text "${text}")
  file(GENERATE OUTPUT "${CMAKE_BINARY_DIR}/installed/${script}" CONTENT "${text}")
  install(PROGRAMS "${CMAKE_BINARY_DIR}/installed/${script}" DESTINATION "${share}/safegrad/launch")
endforeach()

if(SKBUILD)
  install(DIRECTORY tools DESTINATION . FILES_MATCHING PATTERN "*.py" PATTERN "*.jsonl"
    PATTERN config_page.py EXCLUDE PATTERN __pycache__ EXCLUDE)
  file(GENERATE OUTPUT "${CMAKE_BINARY_DIR}/installed/libtorch_version.txt" CONTENT "${LibTorch_VERSION}\n")
  install(FILES "${CMAKE_BINARY_DIR}/installed/libtorch_version.txt" DESTINATION .)
endif()
