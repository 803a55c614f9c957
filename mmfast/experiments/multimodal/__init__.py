"""Tables 5 and 9 of Javaloy et al. (ICML 2022): MVAE, MMVAE and MoPoE on MNIST-SVHN-Text, without blocks and with them."""
